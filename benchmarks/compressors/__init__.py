"""What compressors of images buy and cost a draft, on the tiny pair of `examples/tiny_vlm`."""
