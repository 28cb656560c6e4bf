"""Types of transformers for annotations in rooms that neither load models nor tokenizers and do not import the
library."""

from transformers import PreTrainedModel as PreTrainedModel
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
