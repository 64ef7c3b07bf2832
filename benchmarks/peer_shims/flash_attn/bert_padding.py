from einops import rearrange as rearrange


def index_first_axis(*args, **kwargs):
    raise RuntimeError("flash_attn is not here")


pad_input = unpad_input = index_first_axis
