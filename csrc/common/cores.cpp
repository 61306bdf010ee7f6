#include "common/cores.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <thread>

namespace kvspn {
namespace {

// A file's first words as a quota and a period in microseconds; false without a limit.
bool read_quota(const std::string& folder, bool unified, double& quota, double& period) {
    if (unified) return bool(std::ifstream(folder + "/cpu.max") >> quota >> period);  // "max" is no number
    return bool(std::ifstream(folder + "/cpu.cfs_quota_us") >> quota) && quota > 0 &&
           bool(std::ifstream(folder + "/cpu.cfs_period_us") >> period);
}

}  // namespace

int granted_cores(const std::string& groups, const std::string& mount) {
    double least = 0;
    std::istringstream lines(groups);
    for (std::string line; std::getline(lines, line);) {  // 0::/path, or 4:cpu,cpuacct:/path of version 1
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const bool unified = controllers.empty();
        if (!unified && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
        std::string path = line.substr(second + 1);
        while (true) {
            if (!path.empty() && path.back() == '/') path.pop_back();
            double quota = 0, period = 0;
            if (read_quota(mount + (unified ? "" : "/cpu") + path, unified, quota, period) && period > 0) {
                const double cores = std::max(1., quota / period);
                least = least ? std::min(least, cores) : cores;
            }
            if (path.empty()) break;
            path.resize(std::min(path.rfind('/'), path.size() - 1));
        }
    }
    return int(least);
}

int usable_cores() {
    int cores = int(std::max(1u, std::thread::hardware_concurrency()));
    cpu_set_t allowed;
    if (!sched_getaffinity(0, sizeof allowed, &allowed)) cores = std::min(cores, CPU_COUNT(&allowed));
    std::ostringstream groups;
    groups << std::ifstream("/proc/self/cgroup").rdbuf();
    const int granted = granted_cores(groups.str(), "/sys/fs/cgroup");
    return granted ? std::min(cores, granted) : cores;
}

}  // namespace kvspn
