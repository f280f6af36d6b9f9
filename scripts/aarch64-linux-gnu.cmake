# Cross-compile the kernels for 64-bit ARM on Linux: cmake --toolchain scripts/aarch64-linux-gnu.cmake (Debian:
# apt-get install g++-aarch64-linux-gnu). tests/kernels/test_arm.py runs them in qemu-user.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
