"""What `benchmarks/engine_vs_peers.py` is made of: engines in processes of their own, rounds, and figures of them."""
