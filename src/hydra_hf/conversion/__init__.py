"""Public checkpoints as initial weights of HYDRA-TOK and HYDRA."""
