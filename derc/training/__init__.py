"""Training: a network, images and options in, the best trained network and its log out; no bundle is needed."""

from derc.training.examples import Examples as Examples
from derc.training.freeze import Trains as Trains
from derc.training.options import TrainOptions as TrainOptions
from derc.training.outcome import Scored as Scored
from derc.training.outcome import Trained as Trained
from derc.training.trainer import train as train
