/* What numactl's configure finds on every target of ours. */
#define TLS _Thread_local
