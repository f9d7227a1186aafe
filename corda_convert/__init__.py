"""corda_convert."""
