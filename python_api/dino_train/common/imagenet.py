"""Mean and standard deviation of ImageNet per RGB channel, for pixels in [0, 1] (main_dino.py:428)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
