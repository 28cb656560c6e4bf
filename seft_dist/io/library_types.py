"""Types of transformers for annotations, for rooms that load no models or tokenizers and do not import it."""

from transformers import PreTrainedModel as PreTrainedModel
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
