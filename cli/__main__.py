from pertstate_cli import main


raise SystemExit(main())
