"""Two runs over the same images: what differs and by how much; or how far two models agree."""
