"""LoRA-XS: adapters of r x r numbers a layer, between singular vectors of the layer itself."""
