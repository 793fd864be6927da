"""Quantised KV-cache attention: formats, reference, ops, page cache. Users import `foldkv`."""
