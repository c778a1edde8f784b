/* Stands for libtorch_cuda.so while the CUDA part is linked, so that this takes no CUDA build of torch: the three
   symbols that the part needs of it. At run time the loader finds the real library under the same name. */
#include <stdbool.h>

int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  (void)device;
  *stream = 0;
  return 0;
}

void torch_c10_cuda_check_msg(int error, const char* file, const char* function, unsigned line, bool check,
                              char** message) {
  (void)error, (void)file, (void)function, (void)line, (void)check;
  *message = 0;
}

void torch_c10_cuda_free_error_msg(char* message) { (void)message; }
