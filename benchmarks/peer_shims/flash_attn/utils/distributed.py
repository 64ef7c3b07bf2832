def all_gather(*args, **kwargs):
    raise RuntimeError("flash_attn is not here")
