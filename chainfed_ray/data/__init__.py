"""From rows to tokens: where rows come from, and how they are split, tokenised and partitioned among clients."""
