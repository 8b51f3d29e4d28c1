"""An OpenAI-style server of text and images: `hydra serve`, pip install hydra_hf[serve]."""
