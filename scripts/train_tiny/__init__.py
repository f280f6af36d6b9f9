"""Train a small Llama (or Mixtral-style) language model from plain text, on a CPU or on one CUDA device.

Four verbs, run in this order (`python scripts/train_tiny --help`):

    tokenizer  text files             -> byte-level BPE tokenizer folder
    pack       text files + tokenizer -> uint16 token streams (<name>.bin)
    train      token streams          -> Hugging Face checkpoint folder
    evaluate   checkpoint + text      -> loss, perplexity, bits per byte, round-to-nearest damage

It makes the embedded model and others for experiments; docs/TRAINING.md has the commands.
"""
