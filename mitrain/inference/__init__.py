"""What is made of a trained run: scores, predictions, reports, exports, merged weights."""
