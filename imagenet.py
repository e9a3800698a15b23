"""ImageNet's pixels: mean and standard deviation of red, green, blue in 0 ... 1, by which pictures are normalised."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
