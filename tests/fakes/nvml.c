/* A libnvidia-ml.so.1 with two invented GPUs, so that the real pynvml is called with what NVML's header says.
   Signatures: nvml.h of the driver's release 580. */
#include <string.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef struct { u32 version; u64 total, reserved, free, used; } memory_v2;
typedef struct { u32 gpu, memory; } utilization;
typedef struct { u32 field, scope; long long timestamp, latency; u32 type, status; union { u32 ui; u64 ull; } value; } field;
typedef struct { u32 pid; u64 used; u32 instance, compute; } process;
typedef struct { char legacy[16]; u32 domain, bus, device, id, subsystem; char bus_id[32]; } pci;

static int gpus[2] = {0, 1};

u32 nvmlInitWithFlags(u32 flags) { return 0; }
u32 nvmlInit_v2(void) { return 0; }
u32 nvmlDeviceGetCount_v2(u32 *count) { *count = 2; return 0; }
u32 nvmlDeviceGetHandleByIndex_v2(u32 index, int **gpu) { if (index > 1) return 2; *gpu = &gpus[index]; return 0; }
u32 nvmlDeviceGetHandleByUUID(const char *uuid, int **gpu) { return 6; }
u32 nvmlDeviceGetIndex(int *gpu, u32 *index) { *index = *gpu; return 0; }
u32 nvmlDeviceGetUUID(int *gpu, char *uuid, u32 size) { strcpy(uuid, *gpu ? "GPU-1b" : "GPU-0a"); return 0; }
u32 nvmlDeviceGetName(int *gpu, char *name, u32 size) { strcpy(name, "NVIDIA H200"); return 0; }
u32 nvmlDeviceGetMemoryInfo_v2(int *gpu, memory_v2 *memory) {
  if (memory->version != 0x02000028) return 25;
  memory->total = 1000; memory->used = 70 + *gpu; return 0;
}
u32 nvmlDeviceGetUtilizationRates(int *gpu, utilization *rates) { rates->gpu = 55; rates->memory = 5; return 0; }
u32 nvmlDeviceGetClockInfo(int *gpu, u32 kind, u32 *mhz) { *mhz = 1000 + kind; return 0; }
u32 nvmlDeviceGetFieldValues(int *gpu, int count, field *values) {
  for (int i = 0; i < count; i++) {
    values[i].status = values[i].field == 186 || values[i].field == 83 ? 0 : 3;
    if (values[i].field == 186) { values[i].type = 1; values[i].value.ui = 654321; }
    else { values[i].type = 3; values[i].value.ull = 123456789012ULL; }
  }
  return 0;
}
u32 nvmlDeviceGetTemperature(int *gpu, u32 sensor, u32 *celsius) { *celsius = 44; return 0; }
u32 nvmlDeviceGetCurrentClocksEventReasons(int *gpu, u64 *reasons) { *reasons = 0x40; return 0; }
u32 nvmlDeviceGetPcieThroughput(int *gpu, u32 counter, u32 *kb) { *kb = counter ? 7 : 9; return 0; }
u32 nvmlDeviceGetComputeRunningProcesses_v3(int *gpu, u32 *count, process *found) {
  if (!found) { *count = 1; return 7; }
  found[0].pid = 1; found[0].used = 12345; *count = 1; return 0;
}
u32 nvmlDeviceGetEnforcedPowerLimit(int *gpu, u32 *milliwatts) { *milliwatts = 700000; return 0; }
u32 nvmlDeviceGetPciInfo_v3(int *gpu, pci *found) { strcpy(found->bus_id, *gpu ? "00000000:D8:00.0" : "00000000:C8:00.0"); return 0; }
u32 nvmlDeviceGetCurrPcieLinkGeneration(int *gpu, u32 *value) { *value = 4; return 0; }
u32 nvmlDeviceGetMaxPcieLinkGeneration(int *gpu, u32 *value) { *value = 5; return 0; }
u32 nvmlDeviceGetCurrPcieLinkWidth(int *gpu, u32 *value) { *value = 8; return 0; }
u32 nvmlDeviceGetMaxPcieLinkWidth(int *gpu, u32 *value) { *value = 16; return 0; }
u32 nvmlDeviceGetNvLinkState(int *gpu, u32 link, u32 *active) { if (link >= 18) return 2; *active = link < 4; return 0; }
u32 nvmlDeviceGetNvLinkRemoteDeviceType(int *gpu, u32 link, u32 *type) { *type = link ? 2 : 0; return 0; }
u32 nvmlDeviceGetNvLinkRemotePciInfo_v2(int *gpu, u32 link, pci *found) {
  strcpy(found->bus_id, link ? "00000000:01:00.0" : *gpu ? "00000000:C8:00.0" : "00000000:D8:00.0"); return 0;
}
u32 nvmlDeviceGetTopologyCommonAncestor(int *gpu, int *other, u32 *level) { *level = 50; return 0; }
const char *nvmlErrorString(u32 code) { return "an error"; }
