"""From a trained model to scores: predictions, CIDEr, judged answers, results."""
