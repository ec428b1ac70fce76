"""The runtime: images in, instances out, without torch.

from cl4wsis_serve import Predictor
predictor = Predictor.open("shapes-step2.cl4wsis")
instances = predictor.predict("photo.jpg")
"""

from cl4wsis_serve.backends import BACKENDS, backend_status
from cl4wsis_serve.predictor import Predictor

__all__ = ["BACKENDS", "Predictor", "backend_status"]
