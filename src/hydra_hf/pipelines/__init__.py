"""Uses of a trained model: pipelines of diffusers for HYDRA and HYDRA-TOK."""
