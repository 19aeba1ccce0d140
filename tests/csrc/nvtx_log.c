// Prints what reaches NVTX: a push as "+name", a pop as "-".
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>

static int push(const char *name) {
  printf("+%s\n", name);
  fflush(stdout);
  return 0;
}

static int pop(void) {
  printf("-\n");
  fflush(stdout);
  return 0;
}

int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t export_table) {
  const NvtxExportTableCallbacks *callbacks = export_table(NVTX_ETID_CALLBACKS);
  NvtxFunctionTable table = 0;
  unsigned int size = 0;
  if (!callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size)) return 0;
  *table[NVTX_CBID_CORE_RangePushA] = (NvtxFunctionPointer)push;
  *table[NVTX_CBID_CORE_RangePop] = (NvtxFunctionPointer)pop;
  return 1;
}
