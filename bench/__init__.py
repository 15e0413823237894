"""The measured comparison: attnc beside its peers in one run, on this machine. `python -m bench --help`."""
