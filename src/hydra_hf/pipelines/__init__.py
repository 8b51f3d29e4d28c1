"""How a trained model is used: diffusers' pipelines around HYDRA and HYDRA-TOK."""
