"""What the training scripts share, one room for each concern; each imports only from those above.

threads      BLAS threads: imported before NumPy (one_thread: always one)
files        opening and reading untrusted files
terminal     the line that moves
digits       synthetic digits
mnist        the download of MNIST
images       resizing, image files and folders of them
datasets     IDX and .npz files, what --data names, splits
command_line a command line from a record of options
options      every option with its default
choices      what options stand for: loss, optimizer, schedule, augmentation
team         workers and MPI ranks
prediction   the network at inference, layer by layer
loop         the training loop
checkpoints  run folders: model, metrics, run.json, checkpoint
classification classes of images by a network from its run folder
export       networks for other runtimes (needs onnx)
pictures     arrays as pictures (needs matplotlib)
run          a script from its command line to its exit code
"""
