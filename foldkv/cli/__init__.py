"""The command line `foldkv`. One module per command; torch and transformers are imported inside the commands only."""
