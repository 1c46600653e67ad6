"""The same app on Ray Serve: `Api` replicas without a device, and `Engine` replicas that each own one."""
