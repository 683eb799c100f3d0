"""Helpers that know nothing of models: files, stores, progress, memory, hosts, versions, statistics. They import no other
package of ours."""
