// How many threads pay in this process.
#pragma once

#include <string>

namespace kvspn {

// Cores that the process may keep busy: those that it may run on, or fewer where its control groups grant
// less time than these have. At least 1.
int usable_cores();

// Whole cores that control groups grant, 0 for no limit. `groups`: the text of /proc/self/cgroup; `mount`:
// where the control groups are mounted. What is above a group limits it, too.
int granted_cores(const std::string& groups, const std::string& mount);

}  // namespace kvspn
