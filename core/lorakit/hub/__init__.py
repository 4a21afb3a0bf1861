"""Repositories of the Hugging Face hub: ids, listings, downloads into the hub's own cache.

Nothing here imports huggingface_hub before something has to be looked up.
"""
