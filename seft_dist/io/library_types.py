"""Types of transformers for annotations, for subpackages that load no models or tokenizers and so do not import it."""

from transformers import PreTrainedModel as PreTrainedModel
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
