// What a C++ program's exceptions need: the unwinder, through frames with
// destructors, of a type found by its base, and rethrown.
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

struct Guard {
	std::vector<std::string> &log;
	std::string name;
	~Guard() { log.push_back("left " + name); }
};

static int depth(std::vector<std::string> &log, int level)
{
	Guard guard{log, std::to_string(level)};
	if (level == 0)
		throw std::runtime_error("thrown at the bottom");
	return depth(log, level - 1) + 1;
}

int main()
{
	std::vector<std::string> log;
	try {
		try {
			depth(log, 5);
		} catch (const std::logic_error &) {
			log.push_back("wrong handler");
		} catch (...) {
			log.push_back("rethrown");
			throw;
		}
	} catch (const std::exception &error) {
		log.push_back(error.what());
	}
	for (const auto &line : log)
		std::cout << line << '\n';
	try {
		std::cout << std::stoi("no number") << '\n';
	} catch (const std::invalid_argument &error) {
		std::cout << "caught " << error.what() << '\n';
	}
}
