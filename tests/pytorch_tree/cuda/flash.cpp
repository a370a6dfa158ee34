extern "C" int flash_attention() { return 1; }
