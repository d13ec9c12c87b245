"""What calibration data are used for: two networks run in step, layers sampled, and the kept weights solved anew.

`batches` reads the data, `misfits` and `likeness` tell what is wrong with them, `lockstep` runs the dense and the
pruned network over them, `following` sees what comes after a layer, `samples` draws the rows of its least squares
problem, `least_squares` solves it, `held_out` says how well that predicts other images, `refitting` solves one layer
after the other; `survey` looks at layers of the dense network beforehand, `damage` is the error that a refit would
leave, `unit_damage` that of all layers that read a channel space, `joins` what remains of it where branches end.
`agreement` compares networks on inputs that were held out, and `judging` does so for plans. `recovery` trains what the
refit left, to give at the ends of blocks (`blocks`) what the dense network gives: by `drawing` minibatches,
`augmentation` and `relative_steps`.
"""

from fxprune.calibration.batches import Batch, Calibration, read_batches
from fxprune.calibration.refitting import FITS, Choose, LayerFit, reconstruct
from fxprune.calibration.survey import survey

__all__ = ["FITS", "Batch", "Calibration", "Choose", "LayerFit", "read_batches", "reconstruct", "survey"]
