"""python -m benchmarks.machine_code: the compiled CUDA kernels judged without a GPU.

What stands in their machine code, what it computes, and how long a model of the chip takes to run it.

    cubin       what a library contains, by cuobjdump: resources, machine code
    static      figures of a kernel that need no run
    sass        the machine code's instructions
    launches    the launches that the project's own host code makes for a list of layers
    problem     the layers' tensors at the addresses of those launches, and what must come out
    interpreter one block of a launch, executed, with
    memory        the GPU's global memory,
    step          the operands of an instruction, and
    semantics     what it computes: meanings, integers, reals, doubles
    trace       what the block's instructions ask of the chip
    chip        a model of the chip, driven by such traces
    flat        a flat cast and a flat add, to calibrate it
    predict     a list of layers on sm_90, from executed blocks
    report      all figures of a library for ResNet-50
"""
