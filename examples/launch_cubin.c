/* Launches an exported Triton kernel through the CUDA driver API, without Python or the CUDA toolkit's
 * libraries.
 *
 *     kvspn export-kernels --target cuda:90 out
 *     cc -I out -I <a folder with cuda.h> examples/launch_cubin.c -ldl -o launch_cubin
 *     ./launch_cubin out
 *
 * The kernel is accept_and_rollback: of a row of two tokens, with the draft 7 confirmed, it makes four. */
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvspn_kernels.h"

static void* driver;

static void* function(const char* name) {
    void* found = dlsym(driver, name);
    if (!found) {
        fprintf(stderr, "the driver has no %s\n", name);
        exit(1);
    }
    return found;
}

#define CALL(name, type, ...)                                               \
    do {                                                                    \
        CUresult status = ((CUresult(*) type)function(#name))(__VA_ARGS__); \
        if (status != CUDA_SUCCESS) {                                       \
            fprintf(stderr, "%s: error %d\n", #name, status);               \
            exit(1);                                                        \
        }                                                                   \
    } while (0)

static CUdeviceptr upload(const void* data, size_t size) {
    CUdeviceptr pointer;
    CALL(cuMemAlloc_v2, (CUdeviceptr*, size_t), &pointer, size);
    CALL(cuMemcpyHtoD_v2, (CUdeviceptr, const void*, size_t), pointer, data, size);
    return pointer;
}

int main(int argc, char** argv) {
    const struct kvspn_kernel* kernel = NULL;
    for (size_t i = 0; i < sizeof kvspn_kernels / sizeof *kvspn_kernels; ++i)
        if (!strncmp(kvspn_kernels[i].name, "accept_and_rollback", 19)) kernel = &kvspn_kernels[i];
    const char* expected =
        "pointer tokens, pointer lengths, pointer finished, pointer stats, pointer draft, pointer argmax, "
        "pointer rank, int32_t k, int32_t eos, int32_t max_length, int32_t queries, int32_t tokens_b, "
        "int32_t stats_b, int32_t argmax_b";
    if (argc != 2 || !kernel || strcmp(kernel->arguments, expected)) {
        fprintf(stderr, "usage: launch_cubin DIR, the folder whose kvspn_kernels.h this was built with\n");
        return 1;
    }
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) {
        fprintf(stderr, "no CUDA driver here: %s\n", dlerror());
        return 1;
    }
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", argv[1], kernel->file);
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUfunction launched;
    CALL(cuInit, (unsigned), 0);
    CALL(cuDeviceGet, (CUdevice*, int), &device, 0);
    CALL(cuDevicePrimaryCtxRetain, (CUcontext*, CUdevice), &context, device);
    CALL(cuCtxSetCurrent, (CUcontext), context);
    CALL(cuModuleLoad, (CUmodule*, const char*), &module, path);
    CALL(cuModuleGetFunction, (CUfunction*, CUmodule, const char*), &launched, module, kernel->symbol);

    int32_t tokens_here[448] = {3, 5}, length_here = 1, stats_here[3] = {0};
    int32_t draft_here = 7, argmax_here[2] = {7, 9}, rank_here = 0;
    char finished_here = 0;
    CUdeviceptr tokens = upload(tokens_here, sizeof tokens_here), lengths = upload(&length_here, 4);
    CUdeviceptr finished = upload(&finished_here, 1), stats = upload(stats_here, sizeof stats_here);
    CUdeviceptr draft = upload(&draft_here, 4), argmax = upload(argmax_here, 8), rank = upload(&rank_here, 4);
    int32_t k = 1, eos = 2, max_length = 448, queries = 2, tokens_b = 448, stats_b = 3, argmax_b = 2;
    CUdeviceptr scratch = 0, profile = 0;
    void* arguments[] = {&tokens, &lengths,    &finished, &stats,    &draft,   &argmax,   &rank,    &k,
                         &eos,    &max_length, &queries,  &tokens_b, &stats_b, &argmax_b, &scratch, &profile};
    CALL(cuLaunchKernel,
         (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**,
          void**),
         launched, kernel->grid[0], kernel->grid[1], kernel->grid[2], kernel->threads, 1, 1,
         kernel->shared_bytes, NULL, arguments, NULL);
    CALL(cuMemcpyDtoH_v2, (void*, CUdeviceptr, size_t), tokens_here, tokens, sizeof tokens_here);
    CALL(cuMemcpyDtoH_v2, (void*, CUdeviceptr, size_t), &length_here, lengths, 4);
    printf("tokens %d %d %d %d, length %d\n", tokens_here[0], tokens_here[1], tokens_here[2], tokens_here[3],
           length_here);
    return !(length_here == 3 && tokens_here[2] == 7 && tokens_here[3] == 9);
}
