"""afina: fine-tunes causal language models under DeepSpeed. The rooms and their order are in CONTRIBUTING.md."""

import logging

# Said at import, by whichever library imports bitsandbytes first, about a kernel that afina does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
