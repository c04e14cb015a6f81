from peer_jax.cli import main

main()
