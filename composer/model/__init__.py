"""Pure values: what a recipe, a target, a lock, a layer and a manifest are. Nothing here touches the world."""
