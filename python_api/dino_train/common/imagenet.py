"""Mean and standard deviation of ImageNet's red, green and blue, by which pixels from 0 to 1 are normalized
(main_dino.py:428)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
