"""From rows to tokens: where rows come from, how they are split, tokenised and dealt."""
