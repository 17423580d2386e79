"""Pure network parts, shared by the methods: patches, masking, position tables, ViT blocks, the masked autoencoder."""
