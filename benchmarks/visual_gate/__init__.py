"""Whether attention to the image says which rounds a draft will lose, on the tiny pair."""
