"""One BLAS thread: imported first by a script that has several workers by default."""

from training.threads import use_one_thread

use_one_thread()
