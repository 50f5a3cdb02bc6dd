"""To other formats and to the Hub: exports, pushes, model cards."""
