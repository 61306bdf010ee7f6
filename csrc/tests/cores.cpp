// Prints the cores that control groups grant: cores FILE MOUNT, as of /proc/self/cgroup and /sys/fs/cgroup.
#include "common/cores.h"

#include <cstdio>
#include <fstream>
#include <sstream>

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    std::ostringstream groups;
    groups << std::ifstream(argv[1]).rdbuf();
    std::printf("%d\n", kvspn::granted_cores(groups.str(), argv[2]));
}
