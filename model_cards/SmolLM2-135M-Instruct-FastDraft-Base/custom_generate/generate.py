"""Assisted decoding with this draft, through fastdraft_hf where it is installed.

    target.generate(
        **inputs, assistant_model=draft, custom_generate="THIS/REPOSITORY", trust_remote_code=True
    )

Without fastdraft_hf this is transformers' own assisted generation: the same text, slower, and one
prompt at a time.
"""

import warnings


def generate(model, custom_generate=None, **kwargs):  # type: ignore[no-untyped-def]
    """Generate with ``model``; the arguments are those of ``generate``."""
    # The class's method: with trust_remote_code the model's own `generate` is this function.
    stock = type(model).generate
    if kwargs.get("assistant_model") is None:
        return stock(model, **kwargs)
    try:
        from fastdraft_hf import assisted_decoding
    except ImportError:
        warnings.warn("fastdraft_hf is not installed; transformers' own loop is used", stacklevel=2)
        return stock(model, **kwargs)
    return stock(model, custom_generate=assisted_decoding, **kwargs)
