"""Public checkpoints as first weights of HYDRA-TOK and HYDRA."""
