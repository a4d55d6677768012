"""What each part of ViSpec and of its training buys, on the tiny pair of `examples/tiny_vlm`."""
