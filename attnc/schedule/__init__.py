"""From a proved structure to loops: concrete geometry, tiles, strategy, the plan graph. No text of any language."""
